"""Put this folder on the import path: ``gguf_writer``, ``reference`` and other helpers are modules of it."""
