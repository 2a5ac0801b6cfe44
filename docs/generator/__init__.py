"""What `docs/build.py` is made of: measuring, counting, and writing Markdown."""
