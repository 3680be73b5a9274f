"""How blocks look: in a terminal, as GitHub Markdown, as HTML."""
