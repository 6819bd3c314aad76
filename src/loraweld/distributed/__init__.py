"""A merge whose parts are made by several processes, on one machine or on many."""
