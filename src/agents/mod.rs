//! What is done without having been asked for: each agent is a thread that waits and calls.

pub mod collapse;
pub mod patrol;
