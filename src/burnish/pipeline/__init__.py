"""The stages that turn one model into another, each measured and gated, and the records they leave behind."""
