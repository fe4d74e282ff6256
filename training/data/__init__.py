"""Text sources, tokenizers, the token store, samplers and the loader: from a config's `data` section to batches of
token rows.
"""
