"""The Hugging Face Hub: where a model goes, what is said of it, and what the client's errors mean."""
