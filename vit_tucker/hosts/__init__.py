"""What the models look like whose modules are replaced."""
