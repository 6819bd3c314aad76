"""The way back: two models of one shape → the adapter that leads from one to the other."""
