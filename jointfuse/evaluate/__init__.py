"""What a trained model is worth: scores, figures and a report that opens anywhere."""
