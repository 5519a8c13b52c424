"""What a run showed: one self-contained HTML page, the same as Markdown and JSON, and tables in the terminal."""
