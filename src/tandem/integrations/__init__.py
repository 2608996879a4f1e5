"""Third-party products behind tandem's protocols: DeepSpeed, Gaudi, OpenAI-compatible servers."""
