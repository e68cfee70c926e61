//! The features of the FUSE protocol that this filesystem needs, and the answer to FUSE_INIT.

use super::LARGEST_REQUEST;
use fuser::{InitFlags, KernelConfig};
use std::io;

/// The features that the kernel must offer, each with the first version that has it.
const REQUIRED: &[(InitFlags, &str)] = &[
    (InitFlags::FUSE_PASSTHROUGH, "FUSE passthrough (CONFIG_FUSE_PASSTHROUGH, Linux 6.9)"),
    (InitFlags::FUSE_POSIX_ACL, "POSIX ACLs in FUSE (Linux 4.9)"),
    (InitFlags::FUSE_DONT_MASK, "FUSE_DONT_MASK (Linux 2.6.31)"),
    (InitFlags::FUSE_EXPORT_SUPPORT, "FUSE_EXPORT_SUPPORT (Linux 2.6.28)"),
    (InitFlags::FUSE_HANDLE_KILLPRIV_V2, "FUSE_HANDLE_KILLPRIV_V2 (Linux 5.11)"),
];

/// The features that make the filesystem faster where the kernel has them.
const WELCOME: &[InitFlags] = &[InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_CACHE_SYMLINKS];

/// Names the required features that are not among `offered`; `None` if all are.
fn missing(offered: InitFlags) -> Option<String> {
    let names: Vec<_> = REQUIRED
        .iter()
        .filter(|(flag, _)| !offered.contains(*flag))
        .map(|(_, name)| *name)
        .collect();
    (!names.is_empty()).then(|| format!("this kernel lacks {}", names.join(", ")))
}

/// Answers FUSE_INIT: asks the kernel for the features.
///
/// # Errors
/// `Unsupported`, with the names of the features that the kernel lacks.
pub(super) fn agree(config: &mut KernelConfig) -> io::Result<()> {
    if let Some(what) = missing(config.capabilities()) {
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    let refused = |what: &str| io::Error::new(io::ErrorKind::Unsupported, what.to_owned());
    for (flag, name) in REQUIRED {
        config.add_capabilities(*flag).map_err(|_| refused(name))?;
    }
    for flag in WELCOME {
        let _ = config.add_capabilities(*flag);
    }
    config.set_max_stack_depth(1).map_err(|_| refused("a stacking depth of 1"))?;
    config.set_max_write(LARGEST_REQUEST).map_err(|_| refused("writes of 1 MiB"))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_passthrough_is_told_what_it_lacks() {
        let all = REQUIRED.iter().fold(InitFlags::empty(), |flags, (flag, _)| flags | *flag);
        assert_eq!(missing(all), None);
        let what = missing(all - InitFlags::FUSE_PASSTHROUGH).expect("something is missing");
        assert!(what.contains("FUSE passthrough") && what.contains("6.9"), "{what}");
    }
}
