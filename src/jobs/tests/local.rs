//! The store in a folder.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use tempfile::TempDir;

use super::bench::Stores;
use super::conformance::conformance_tests;
use crate::jobs::local::LocalStore;
use crate::jobs::{JobStore, StoreSettings};

/// Stores in a temporary folder.
#[derive(Debug)]
struct Folder {
    folder: TempDir,
    open: Mutex<Vec<Arc<LocalStore>>>,
}

impl Folder {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            open: Mutex::new(Vec::new()),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("jobs")
    }
}

#[async_trait]
impl Stores for Folder {
    async fn open(&self, settings: StoreSettings) -> Arc<dyn JobStore> {
        let store = LocalStore::open(&self.path(), settings).await.unwrap();
        self.open.lock().unwrap().push(Arc::clone(&store));
        store
    }

    async fn kill(&self, _store: Arc<dyn JobStore>) {
        let open = std::mem::take(&mut *self.open.lock().unwrap());
        for store in open {
            store.close().await;
        }
    }
}

conformance_tests!(Folder::new());
