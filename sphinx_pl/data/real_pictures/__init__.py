"""Real pictures and real text: photographs, clip art and documentation from published packages.

`writer.build` makes training data, held-out questions and weights from them (the command is
`sphinx-data real`). docs/real.md names the packages and their licences.
"""
