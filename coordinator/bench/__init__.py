"""The load tool `bench-tp`: a client of OpenAI endpoints that may also start `tpserve serve`."""
