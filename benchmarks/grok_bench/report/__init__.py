"""What comes of result files: tables, Markdown, figures, a page, and the comparison of two runs."""
