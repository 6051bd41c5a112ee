//! Adapters in requests: how they are named, and their weights before a job is submitted.

mod given;
mod routes;
mod status;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_models::adapter::Adapter;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout_at};

use crate::adapters::AdapterError;
use crate::engine::JobError;
use crate::request::{Catalogue, ChosenAdapter, GivenAdapter};

use super::LoadedApp;
use super::error::ApiError;
use super::invalid::InvalidBody;

pub(super) use self::given::{LorasField, WrittenAdapter, written_adapters};
pub(super) use self::routes::{__path_load, __path_refresh, __path_unload, load, refresh, unload};
pub(super) use self::status::AdapterStatus;

/// How often a request that waits for room looks for it.
const POLL: Duration = Duration::from_millis(20);

/// Whether the weights of a request wait for room in the host cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    Awaited,
    /// For a job that will not run.
    Ignored,
}

impl LoadedApp {
    /// Whether an adapter can be selected as the model: it is listed, and the model has another name.
    pub(super) fn is_adapter(&self, name: &str) -> bool {
        let is_model = self.settings.served_model_names.iter().any(|it| it == name);
        !is_model && self.adapters.catalogue().get(name).is_some()
    }

    /// The names of the adapters of a request: the one that `model` names, and those that were written.
    pub(super) fn given_adapters(
        &self,
        model: Option<&str>,
        written: Vec<WrittenAdapter>,
        catalogue: &Catalogue,
    ) -> Result<Vec<GivenAdapter>, ApiError> {
        let mut given = Vec::new();
        for adapter in written {
            given.push(self.given_adapter(adapter, catalogue)?);
        }
        let names = &self.settings.served_model_names;
        let model = model.filter(|model| !names.iter().any(|name| name == model));
        let Some(model) = model else {
            return Ok(given);
        };
        if catalogue.get(model).is_some() {
            if !given.iter().any(|adapter| adapter.name == model) {
                given.insert(
                    0,
                    GivenAdapter {
                        name: model.to_owned(),
                        scale: None,
                    },
                );
            }
        } else if self.adapters.is_removed(model) {
            return Err(self.unknown_model(model.to_owned()));
        } else {
            self.refuse_unusable(model, "model")?;
        }
        Ok(given)
    }

    fn given_adapter(
        &self,
        written: WrittenAdapter,
        catalogue: &Catalogue,
    ) -> Result<GivenAdapter, ApiError> {
        let WrittenAdapter {
            name,
            file,
            scale,
            param,
        } = written;
        let of_file = file.as_ref().map(|file| {
            let found = self.adapters.name_of_file(&file.path);
            found.ok_or_else(|| InvalidBody::UnlistedFile {
                param: file.param.clone(),
                file: file.path.clone(),
            })
        });
        let name = match (name, of_file.transpose()?) {
            (Some(name), Some(of_file)) if catalogue.get(&name).is_some() && name != of_file => {
                let file = file.map(|file| file.param).unwrap_or_default();
                return Err(InvalidBody::conflict(&param, &file).into());
            }
            (_, Some(name)) | (Some(name), None) => name,
            (None, None) => return Err(InvalidBody::missing(&param).into()),
        };
        self.refuse_unusable(&name, &param)?;
        Ok(GivenAdapter { name, scale })
    }

    fn refuse_unusable(&self, name: &str, param: &str) -> Result<(), ApiError> {
        let reason = self.adapters.why_unusable(name);
        reason.map_or(Ok(()), |reason| {
            let name = name.to_owned();
            Err(ApiError::Adapter {
                error: AdapterError::Unusable { name, reason },
                param: Some(param.to_owned()),
            })
        })
    }

    /// The error of a model name that nothing has.
    pub(super) fn unknown_model(&self, name: String) -> ApiError {
        let served = self.settings.served_model_names.iter().cloned();
        let adapters = self.adapters.catalogue();
        let adapters = adapters.iter().map(|info| info.name.clone());
        let served: Vec<String> = served.chain(adapters).collect();
        let served = served.join(", ");
        ApiError::UnknownModel { name, served }
    }

    /// The weights of a request's adapters, in their order.
    ///
    /// With [`Room::Awaited`], requests with adapters take turns in the order of their arrival: each waits
    /// until its adapters have room in the host cache beside those in use. A request whose adapters never
    /// have room gets them as soon as no others are in use.
    pub(super) async fn weights(
        self: &Arc<Self>,
        chosen: &[ChosenAdapter],
        deadline: Option<Instant>,
        room: Room,
    ) -> Result<Vec<Arc<Adapter>>, ApiError> {
        if chosen.is_empty() {
            return Ok(Vec::new());
        }
        let names: Vec<String> = chosen.iter().map(|it| it.info.name.clone()).collect();
        if room == Room::Ignored {
            return self.read(names).await;
        }
        let waiting = async {
            let _turn = self.adapter_turn.lock().await;
            while !self.adapters.has_room(names.iter().map(String::as_str)) {
                sleep(POLL).await;
            }
            self.read(names).await
        };
        match deadline {
            None => waiting.await,
            Some(deadline) => timeout_at(deadline.into(), waiting)
                .await
                .unwrap_or(Err(ApiError::Job(JobError::DeadlinePassed))),
        }
    }

    async fn read(self: &Arc<Self>, names: Vec<String>) -> Result<Vec<Arc<Adapter>>, ApiError> {
        let app = Arc::clone(self);
        let adapters = spawn_blocking(move || {
            let names = names.iter();
            names.map(|name| app.adapters.get(name)).collect()
        });
        let adapters: Result<Vec<_>, AdapterError> = adapters.await?;
        Ok(adapters?)
    }
}
