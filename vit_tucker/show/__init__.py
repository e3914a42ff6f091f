"""Tables and figures, one style each."""
