//! fio reads the bytes that it wrote, by every way into the kernel.

use crate::support::Pool;
use crate::{at_length, said, tests};
use std::process::Command;

tests!(fio_reads_what_it_wrote);

const ENGINES: &[(&str, &[&str])] = &[
    ("mmap", &[]),
    ("psync", &[]),
    ("io_uring", &["--iodepth=8"]),
    ("io_uring", &["--iodepth=8", "--fixedbufs=1"]),
    ("libaio", &["--iodepth=8", "--direct=1", "--offset=512"]),
];

fn fio_reads_what_it_wrote() {
    let pool = Pool::small(64);
    let size = 4 * at_length(16);
    for (engine, more) in ENGINES {
        for pattern in ["write", "randwrite", "randrw"] {
            for block in ["4k", "64k", "1m"] {
                let mut command = Command::new("fio");
                command.arg("--name=job").arg(format!("--directory={}", pool.path().display()));
                command.arg(format!("--ioengine={engine}")).args(*more);
                command
                    .arg(format!("--rw={pattern}"))
                    .arg(format!("--bs={block}"))
                    .arg(format!("--size={size}m"));
                command.args([
                    "--verify=crc32c",
                    "--do_verify=1",
                    "--verify_fatal=1",
                    "--verify_state_save=0",
                    "--unlink=1",
                    "--minimal",
                ]);
                let text = said(&mut command);
                assert!(!text.contains("verify:"), "{text}");
            }
        }
        println!("fio  {engine} {more:?}: 9 jobs of {size} MiB verified by crc32c");
    }
    pool.check();
    pool.unmount();
}
