//! QEMU's monitor for people.

use std::io::Read;
use std::os::unix::net::UnixStream;

/// Reads the words of the monitor up to its prompt.
pub fn read_to_prompt(monitor: &mut UnixStream) -> String {
    let mut said = Vec::new();
    let mut byte = [0];
    while !said.ends_with(b"(qemu) ") {
        assert_eq!(monitor.read(&mut byte).unwrap(), 1, "QEMU has ended");
        said.push(byte[0]);
    }
    String::from_utf8_lossy(&said).into_owned()
}
