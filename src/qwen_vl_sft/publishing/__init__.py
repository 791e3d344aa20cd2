"""What goes to the Hub: the files, the model card, the push and its comparison."""
