"""Reports of result files: tables, Markdown, one page, one figure, and the comparison of two files."""
