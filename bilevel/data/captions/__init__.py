"""Images with captions: sources, packing, embeddings of captions, class captions."""
