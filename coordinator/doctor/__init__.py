"""`tpserve doctor`: tells what of this host would keep a server from starting or make it slow, and what to do."""
