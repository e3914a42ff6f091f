"""What a user wrote, checked; and what is said of a mistake."""
