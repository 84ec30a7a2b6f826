"""Makes the demonstration model: data, vocabulary, training, export and its scores. See ``README.md`` here.

A maintainers' tool. It needs the extra ``demo-train``; the package and its build never import it.
"""
