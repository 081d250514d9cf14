"""What becomes of channel labels in each of torch's operators, one file a family of operators."""
