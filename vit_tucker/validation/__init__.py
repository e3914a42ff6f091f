"""Checks of what a user wrote, and the message for a mistake."""
