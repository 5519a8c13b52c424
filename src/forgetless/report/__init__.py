"""What a run showed: one self-contained HTML page, Markdown, and tables in the terminal."""
