"""Many runs and audits under one question: arms, a table and a figure each."""
