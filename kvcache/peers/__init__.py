"""Other nodes: who they are, what they hold, and how blocks come from them and go to them."""
