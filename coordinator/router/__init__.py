"""One door before several replicas: which of them a request goes to, and what happens when one of them dies."""
