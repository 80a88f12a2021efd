"""What to run and what to buy, and the page that shows it."""
