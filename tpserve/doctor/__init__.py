"""`tpserve doctor`: whether these machines can serve together, and how well."""
