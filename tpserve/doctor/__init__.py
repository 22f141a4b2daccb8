"""`tpserve doctor`: checks whether a set of machines can serve a model together, and how well."""
