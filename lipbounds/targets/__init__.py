"""What can be bounded: frozen data, validated once."""
