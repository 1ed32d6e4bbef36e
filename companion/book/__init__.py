"""The book: run the notebooks, build the pages, serve every script locally."""
