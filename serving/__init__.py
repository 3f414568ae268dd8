"""HTTP server of a captioner: OpenAI's and Ollama's request shapes, dynamic batches, limits and metrics."""
