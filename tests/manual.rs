//! The man pages and the completions that `hugetlb2 generate` writes, read by groff(1) and by the
//! shells.

mod support;

use hugetlb2fs::{attributes, options};
use std::fs;
use std::path::Path;
use std::process::Command;
use support::{hugetlb2, limits, run, text};

fn generate() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    run(hugetlb2().arg("generate").arg(directory.path()));
    directory
}

/// The text of a page below `man`, as a reader sees it. Asserts that groff has nothing to complain
/// of.
fn page(man: &Path, name: &str) -> String {
    let mut groff = Command::new("groff");
    groff.args(["-s", "-man", "-ww", "-Tascii", "-P-cbou", "-rHY=0", "-rLL=200n"]).arg(name);
    let output = limits::output(limits::PROGRAM, groff.current_dir(man)).expect("groff-base");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// The words of a text, with one blank between two of them.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn each_page_is_read_without_a_complaint() {
    let share = generate();
    let man = share.path().join("man");
    let mut pages = 0;
    for section in ["man5", "man8"] {
        for entry in fs::read_dir(man.join(section)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let text = page(&man, &format!("{section}/{name}"));
            assert!(text.contains("NAME") && text.contains("SEE ALSO"), "{name}: {text}");
            pages += 1;
        }
    }
    assert!(pages > 20, "{pages}");
    let aliases =
        [("umount.hugetlb2", "umount.fuse.hugetlb2"), ("mount.fuse.hugetlb2", "mount.hugetlb2")];
    for (alias, program) in aliases {
        let of = |name: &str| page(&man, &format!("man8/{name}.8"));
        assert_eq!(of(alias), of(program));
    }
}

#[test]
fn each_action_has_a_page_with_its_help() {
    let share = generate();
    let man = share.path().join("man");
    let index = page(&man, "man8/hugetlb2.8");
    let help = run(hugetlb2().arg("--help"));
    let actions = help.lines().skip_while(|line| *line != "Commands:").skip(1);
    let actions = actions.take_while(|line| !line.is_empty());
    let actions: Vec<&str> = actions
        .filter_map(|line| {
            line.strip_prefix("  ")?.split(' ').next().filter(|word| !word.is_empty())
        })
        .filter(|action| !["help", "mount"].contains(action)) // mount.hugetlb2 has its own page
        .collect();
    assert!(actions.len() > 15, "{actions:?}");
    for action in actions {
        let name = format!("hugetlb2-{action}");
        assert!(index.contains(&format!("{name}(8)")), "{name}: {index}");
        let text = words(&page(&man, &format!("man8/{name}.8")));
        let short = run(hugetlb2().args([action, "-h"]));
        let first = short.split("\n\n").next().expect("it says what it does");
        assert!(text.contains(&words(first)), "{name}: {first:?} is not in {text}");
    }
}

#[test]
fn the_page_of_the_filesystem_has_each_option_and_attribute() {
    let share = generate();
    let text = words(&page(&share.path().join("man"), "man5/hugetlb2fs.5"));
    for row in options::TABLE {
        let option = format!("{}={} {}", row.name, row.value, words(row.help));
        assert!(text.contains(&option), "{option:?} is not in {text}");
    }
    for row in attributes::TABLE {
        assert_eq!(text.contains(row.name), !row.only_for_tests, "{}", row.name);
        let meanings = row.get.into_iter().chain(row.set).filter(|_| !row.only_for_tests);
        meanings.for_each(|what| assert!(text.contains(what), "{what:?} is not in {text}"));
    }
}

#[test]
fn the_shells_complete_what_is_typed() {
    let share = generate();
    let path = |name: &str| share.path().join(name).display().to_string();
    let bash = path("bash-completion/completions/hugetlb2");
    let script = format!(
        "source {bash}; COMP_WORDS=(hugetlb2 mig); COMP_CWORD=1; _hugetlb2 hugetlb2 mig hugetlb2; \
         echo \"${{COMPREPLY[@]}}\""
    );
    assert_eq!(run(Command::new("bash").args(["-c", &script])), "migrate\n");
    let fish = path("fish/vendor_completions.d/hugetlb2.fish");
    let script = format!("source {fish}; complete -C 'hugetlb2 migrate ou'");
    let said = run(Command::new("fish").env("HOME", share.path()).args(["-c", &script]));
    assert!(said.starts_with("out\t"), "{said:?}");
    run(Command::new("zsh").arg("-n").arg(path("zsh/vendor-completions/_hugetlb2")));
}
