"""The joint-vector fusion model, equations (1) to (6) of arXiv 2405.17900."""
