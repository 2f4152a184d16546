# services.lacis.coordinator: the control plane of one or several networks.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  cfg = config.services.lacis.coordinator;
  relay = config.services.lacis.relay;
  format = pkgs.formats.json { };
  addresses = import ./addresses.nix { inherit lib; };

  # Policies whose file comes with the system: the coordinator reads each at a path that stays, so that another file is a
  # reload and no restart.
  isStored =
    path: builtins.isPath path || lib.isDerivation path || lib.hasPrefix builtins.storeDir path;
  stored = lib.mapAttrs (_: tailnet: tailnet.policy.path) (
    lib.filterAttrs (_: tailnet: isStored (tailnet.policy.path or "")) cfg.settings.tailnets
  );
  # How the policy is written goes by its name.
  placeOf =
    name: path:
    "lacis/policy/${name}.${
      if lib.hasSuffix ".yaml" "${path}" || lib.hasSuffix ".yml" "${path}" then "yaml" else "hujson"
    }";
  settings = cfg.settings // {
    tailnets = cfg.settings.tailnets // lib.mapAttrs inPlace stored;
  };
  inPlace =
    name: path:
    cfg.settings.tailnets.${name}
    // {
      policy.path = "/etc/${placeOf name path}";
    };
  checked = import ./checked-settings.nix { inherit lib pkgs; } "lacis-coordinator" {
    inherit cfg settings;
    declared = cfg.settings;
  };
  # Policies are read again while the coordinator runs; where they come from, and the rest, is not.
  fixed = settings // {
    tailnets = lib.mapAttrs (
      _: tailnet: tailnet // { policy = tailnet.policy.path or (tailnet ? policy); }
    ) settings.tailnets;
  };

  embedded = cfg.settings.embedded_relay or true;
  stun = if embedded == false then [ ] else embedded.stun_listen or [ "[::]:3478" ];
  open = lib.filter (address: !addresses.isLoopback address && addresses.portOf address != 0);
  # A mistake in it is named when the settings are checked.
  openStun = lib.optionals (lib.all addresses.types.listener.check stun) (open stun);
  collisions =
    what: ours: theirs:
    lib.optional (lib.any (one: lib.any (addresses.collide one) theirs) ours) what;
  shared =
    collisions "TCP port" cfg.settings.listen relay.settings.listen
    ++ collisions "UDP port (STUN)" openStun relay.settings.stun;
in
{
  options.services.lacis.coordinator = {
    enable = lib.mkEnableOption "the Lacis coordinator";

    package = lib.mkPackageOption pkgs "lacis-coordinator" { };

    validate = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = "Whether to check the settings with `lacis-coordinator check` when the system is built.";
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether to open the TCP ports of `settings.listen` and the embedded relay's UDP ports for STUN, loopback left out.";
    };

    settings = lib.mkOption {
      default = { };
      description = ''
        The configuration of the coordinator; {command}`lacis-coordinator schema` describes every key.
        Keys that have no option of their own here are passed on as they are and checked at build time.
      '';
      example = lib.literalExpression ''
        {
          server_url = "https://mesh.example.org";
          tailnets.lab.domain = "lab.example.org";
        }
      '';
      type = lib.types.submodule {
        freeformType = format.type;
        options = {
          server_url = lib.mkOption {
            type = lib.types.strMatching "https?://.+";
            example = "https://mesh.example.org";
            description = "The one URL that every client and relay reaches the coordinator at.";
          };
          listen = lib.mkOption {
            type = lib.types.listOf addresses.types.listener;
            default = [ "127.0.0.1:8080" ];
            example = [
              "0.0.0.0:443"
              "[::]:443"
            ];
            description = "Addresses to listen on. The default is for a reverse proxy on the same host.";
          };
          state_dir = lib.mkOption {
            type = lib.types.str;
            default = "/var/lib/lacis-coordinator";
            readOnly = true;
            description = "Where database and keys live; systemd makes it.";
          };
          admin_socket = lib.mkOption {
            type = lib.types.str;
            default = "/run/lacis-coordinator/admin.sock";
            readOnly = true;
            description = "The socket of {command}`lacis admin`. Members of the group `lacis` may use it.";
          };
          tls = lib.mkOption {
            default = null;
            description = "Certificate and key, when no proxy terminates TLS in front. Both are read again when they change.";
            type = lib.types.nullOr (
              lib.types.submodule {
                options = {
                  cert_file = lib.mkOption {
                    type = lib.types.str;
                    example = "/var/lib/acme/mesh.example.org/fullchain.pem";
                    description = "PEM file with the certificate chain.";
                  };
                  key_file = lib.mkOption {
                    type = lib.types.str;
                    example = "/var/lib/acme/mesh.example.org/key.pem";
                    description = "PEM file with the private key, outside the Nix store.";
                  };
                };
              }
            );
          };
          tailnets = lib.mkOption {
            default = { };
            example = {
              lab.domain = "lab.example.org";
            };
            description = "The networks of this coordinator, by name.";
            type = lib.types.attrsOf (
              lib.types.submodule {
                # Among the rest is `policy`: its attributes, or the file of `policy.path` if it comes with the system, are
                # checked at build time, and a change of them reloads the coordinator instead of restarting it.
                freeformType = format.type;
                options.domain = lib.mkOption {
                  type = lib.types.nonEmptyStr;
                  example = "lab.example.org";
                  description = "The base domain: a node `bob` is `bob.lab.example.org`.";
                };
              }
            );
          };
        };
      };
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.settings.tailnets != { };
        message = "services.lacis.coordinator.settings.tailnets is empty: declare at least one network, such as tailnets.lab.domain = \"lab.example.org\".";
      }
      {
        assertion = cfg.settings.tls == null || !lib.hasPrefix builtins.storeDir cfg.settings.tls.key_file;
        message = "services.lacis.coordinator.settings.tls.key_file is in the world-readable Nix store: give a path outside it.";
      }
      {
        assertion = relay.enable -> shared == [ ];
        message = "services.lacis.coordinator and services.lacis.relay both listen on the same ${lib.concatStringsSep " and " shared}: change settings.listen or settings.stun of one of them, or set coordinator.settings.embedded_relay = false.";
      }
    ];
    warnings =
      checked.warnings
      ++ lib.optional (cfg.openFirewall && open cfg.settings.listen == [ ])
        "services.lacis.coordinator.openFirewall opens no TCP port: the coordinator listens on loopback only. Open those of the proxy in front of it.";

    environment.etc = {
      "lacis/coordinator.yaml".source = checked.file;
    }
    // lib.mapAttrs' (name: path: lib.nameValuePair (placeOf name path) { source = "${path}"; }) stored;
    environment.systemPackages = [ cfg.package ];

    users.groups.lacis = { };
    users.users.lacis-coordinator = {
      isSystemUser = true;
      group = "lacis";
      home = cfg.settings.state_dir;
      description = "Lacis coordinator";
    };

    # The unit comes with the package; only what depends on the options is added here.
    systemd.packages = [ cfg.package ];
    systemd.services.lacis-coordinator = {
      wantedBy = [ "multi-user.target" ];
      restartTriggers = [ (builtins.toJSON fixed) ];
      reloadTriggers = [ checked.file ] ++ map (path: "${path}") (lib.attrValues stored);
      stopIfChanged = false;
    };

    networking.firewall = lib.mkIf cfg.openFirewall {
      allowedTCPPorts = lib.unique (map addresses.portOf (open cfg.settings.listen));
      allowedUDPPorts = lib.unique (map addresses.portOf openStun);
    };
  };
}
