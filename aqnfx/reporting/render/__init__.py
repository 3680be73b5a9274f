"""How blocks look: in a terminal, and as GitHub Markdown."""
