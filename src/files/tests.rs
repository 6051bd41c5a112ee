//! Tests of what a failed, an interrupted and a successful write leave behind.

use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::thread;

use super::*;

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let names = entries.map(|it| it.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_write_replaces_the_whole_file_and_leaves_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    for content in ["a long first content", "short"] {
        write(&path, content.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), content);
        assert_eq!(names(folder.path()), ["out.png"]);
    }
}

#[test]
fn a_failed_write_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    fs::write(&path, "old").unwrap();
    // A file handle that cannot be written to stands for a full disk.
    let mut file = File::open(&path).unwrap();
    fill(&mut file, b"new", None).unwrap_err();

    let target = folder.path().join("folder");
    fs::create_dir(&target).unwrap();
    // Renaming a file over a folder fails after the content was written.
    replace(&target, b"new", 0o666, None).unwrap_err();
    assert_eq!(names(folder.path()), ["folder", "out.png"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    let no_folder = write(&folder.path().join("none/out.png"), b"new").unwrap_err();
    assert_eq!(no_folder.kind(), ErrorKind::NotFound);
    assert!(unfinished().iter().all(|it| !it.starts_with(folder.path())));
}

#[test]
fn new_files_have_the_umask_s_permissions_and_old_ones_keep_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    fs::write(&plain, "").unwrap();
    let path = folder.path().join("out.png");
    write(&path, b"a").unwrap();
    assert_eq!(mode(&path), mode(&plain));
    for kept in [0o600, 0o640, 0o666, 0o755] {
        fs::set_permissions(&path, fs::Permissions::from_mode(kept)).unwrap();
        write(&path, b"b").unwrap();
        assert_eq!(mode(&path), kept);
    }
    let dump = folder.path().join("dump");
    write_private(&dump, b"a").unwrap();
    assert_eq!(mode(&dump), 0o600);
}

#[test]
fn a_link_stays_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("far")).unwrap();
    symlink("far/out.png", at("near.png")).unwrap();
    symlink("near.png", at("link.png")).unwrap();
    // The first write creates the file that the links lead to.
    for content in ["a", "b"] {
        check(&at("link.png")).unwrap();
        write(&at("link.png"), content.as_bytes()).unwrap();
        assert_eq!(fs::read_to_string(at("far/out.png")).unwrap(), content);
        assert!(at("link.png").is_symlink() && at("near.png").is_symlink());
        assert_eq!(names(&at("far")), ["out.png"]);
    }
    symlink("loop.png", at("loop.png")).unwrap();
    write(&at("loop.png"), b"a").unwrap_err();
    assert!(at("loop.png").is_symlink());
}

#[test]
fn devices_and_pipes_are_written_directly() {
    write(Path::new("/dev/null"), b"a").unwrap();
    assert!(!fs::metadata("/dev/null").unwrap().is_file());
    if Path::new("/dev/full").exists() {
        let full = write(Path::new("/dev/full"), b"a").unwrap_err();
        assert_eq!(full.kind(), ErrorKind::StorageFull);
    }

    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe.png");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    let reader = thread::spawn({
        let pipe = pipe.clone();
        move || fs::read(pipe).unwrap()
    });
    // A check does not open the pipe, which would be the end of the file for the reader.
    check(&pipe).unwrap();
    write(&pipe, b"whole").unwrap();
    assert_eq!(reader.join().unwrap(), b"whole");
    assert_eq!(names(folder.path()), ["pipe.png"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_file_that_a_process_has_open_is_not_replaced() {
    use std::os::fd::AsRawFd;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stdout.txt");
    let file = File::create(&path).unwrap();
    let number = fs::metadata(&path).unwrap().ino();
    let open = format!("/proc/self/fd/{}", file.as_raw_fd());
    write(Path::new(&open), b"a").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"a");
    assert_eq!(fs::metadata(&path).unwrap().ino(), number);
}

#[test]
fn a_check_leaves_no_file_and_changes_none() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    check(&path).unwrap();
    assert!(!path.exists());
    fs::write(&path, "kept").unwrap();
    check(&path).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"kept");
    assert_eq!(names(folder.path()), ["out.png"]);
    let long = "a".repeat(300);
    check(&folder.path().join(long)).unwrap_err();
    check(&folder.path().join("none/out.png")).unwrap_err();
}

/// Needs a user whom permissions hold back: root may write anywhere.
#[test]
fn permissions_of_files_and_folders_are_respected() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("out.png");
    fs::write(&path, "old").unwrap();
    let set = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    set(&path, 0o444);
    if OpenOptions::new().write(true).open(&path).is_ok() {
        return;
    }
    // The folder would let the file be replaced.
    check(&path).unwrap_err();
    write(&path, b"new").unwrap_err();
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    // A writable file in a folder that takes no new ones.
    set(&path, 0o644);
    set(folder.path(), 0o555);
    check(&path).unwrap();
    write(&path, b"new").unwrap();
    check(&folder.path().join("other.png")).unwrap_err();
    set(folder.path(), 0o755);
    assert_eq!(fs::read_to_string(&path).unwrap(), "new");
}
