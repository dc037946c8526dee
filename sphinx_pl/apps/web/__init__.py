"""A local web page for a trained model: upload an image, ask, and see the places that the answer
names.

Text of a model, a user or a file name is not trusted. It reaches the page only through
templates that escape it, and no Markdown is rendered.
"""
