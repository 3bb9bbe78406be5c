"""What a person sees: tables and words for the terminal, and the same facts as plain data."""
