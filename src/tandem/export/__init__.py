"""Models for other programs: GGUF files and Ollama folders, compared with their source."""
