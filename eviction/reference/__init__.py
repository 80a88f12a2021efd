"""What policies are measured against, in replay only: those of the literature, and the optimum."""
