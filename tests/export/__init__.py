"""Exports: GGUF files, Ollama folders, and what serves a merged model."""
