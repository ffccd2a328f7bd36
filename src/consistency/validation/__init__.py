"""What is checked before anything heavy is imported: one line that names the option."""
