"""Several adapters → one: how they are combined, and the PEFT adapter that the methods after PEFT write."""
