"""Products of others behind our protocols: DeepSpeed, Gaudi, OpenAI-compatible servers."""
