"""Mathematics owned by no paper."""
