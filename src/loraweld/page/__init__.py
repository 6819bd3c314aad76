"""What a merge changed, as one HTML page that needs no network."""
