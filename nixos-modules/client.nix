# services.lacis.client: this machine as a node of a mesh.
{
  config,
  lib,
  pkgs,
  utils,
  ...
}:
let
  cfg = config.services.lacis.client;
  inStore = path: path != null && lib.hasPrefix builtins.storeDir path;
  addresses = import ./addresses.nix { inherit lib; };
  firewall = config.networking.firewall;
  isStrict = firewall.enable && (firewall.checkReversePath == true || firewall.checkReversePath == "strict");
  flag = name: value: "--${name}=${if lib.isBool value then lib.boolToString value else value}";
  advertises = cfg.advertiseRoutes != [ ] || cfg.advertiseExitNode;
  uses = cfg.acceptRoutes || cfg.exitNode != null;
  routes = cfg.routing == "server" || cfg.routing == "both";
  isRouted = cfg.routing == "client" || cfg.routing == "both";
in
{
  options.services.lacis.client = {
    enable = lib.mkEnableOption "the Lacis client";

    package = lib.mkPackageOption pkgs "lacis" { };

    interface = lib.mkOption {
      type = lib.types.strMatching "[^/[:space:]]{1,15}";
      default = "lacis0";
      example = "mesh0";
      description = "Name of the tunnel's network interface.";
    };

    port = lib.mkOption {
      type = lib.types.port;
      default = 41641;
      example = 0;
      description = "UDP port of the tunnel; 0 is the one used last, or any.";
    };

    openFirewall = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether to open the tunnel's UDP port. Not needed to be reachable: it only makes direct paths likelier.";
    };

    endpoints = lib.mkOption {
      type = lib.types.listOf addresses.types.endpoint;
      default = [ ];
      example = [
        "198.51.100.7:41641"
        "[2001:db8::7]:41641"
      ];
      description = "Addresses at which peers can reach this node, such as a port that a router forwards. The others are found out.";
    };

    portMapping = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = "Whether to ask the router to map the tunnel's UDP port (UPnP, NAT-PMP, PCP).";
    };

    portSearch = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = ''
        Whether to search for the ports of NATs that use another one for every destination: some hundred small packets each
        time. Networks that NetworkManager calls metered turn it off by themselves; on others that are, turn it off here.
      '';
    };

    trustInterface = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = ''
        Whether the host's firewall accepts everything that comes in by the mesh.
        The network's own rules hold in either case.
      '';
    };

    loginServer = lib.mkOption {
      type = lib.types.nullOr (lib.types.strMatching "https?://[^/?#]+/?");
      default = null;
      example = "https://mesh.example.org";
      description = ''
        URL of the coordinator. With {option}`authKeyFile` the machine joins by itself; with another URL it leaves the network
        that it is in.
      '';
    };

    authKeyFile = lib.mkOption {
      type = lib.types.nullOr (lib.types.strMatching "/.+");
      default = null;
      example = "/run/secrets/lacis-auth-key";
      description = ''
        File with a pre-auth key, outside the Nix store. systemd hands it to the unit that signs in. It is used, and needs to be
        there, only while the machine has no login.
      '';
    };

    tags = lib.mkOption {
      type = lib.types.nullOr (lib.types.listOf (lib.types.strMatching "tag:[a-zA-Z][a-zA-Z0-9-]*"));
      default = null;
      example = [ "tag:server" ];
      description = "Tags that the machine asks for. `null` leaves them as they are.";
    };

    shieldsUp = lib.mkOption {
      type = lib.types.nullOr lib.types.bool;
      default = null;
      example = true;
      description = "Whether to refuse connections of others. `null` leaves it as it is.";
    };

    operator = lib.mkOption {
      type = lib.types.nullOr lib.types.nonEmptyStr;
      default = null;
      example = "alice";
      description = "A local user who may use {command}`lacis` without being root. `null` leaves it as it is.";
    };

    hostname = lib.mkOption {
      type = lib.types.nullOr lib.types.nonEmptyStr;
      default = null;
      example = "bob";
      description = "Name of the node, if it is to differ from the machine's.";
    };

    acceptDns = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = "Whether names of the mesh resolve on this machine.";
    };

    acceptRoutes = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether to use the routes of subnet routers.";
    };

    advertiseRoutes = lib.mkOption {
      type = lib.types.listOf addresses.types.network;
      default = [ ];
      example = [ "192.168.1.0/24" ];
      description = "Networks that this machine routes for the mesh, once the coordinator approves.";
    };

    advertiseExitNode = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether to offer to be an exit node: others may send everything through this machine.";
    };

    exitNode = lib.mkOption {
      type = lib.types.nullOr lib.types.nonEmptyStr;
      default = null;
      example = "gate";
      description = ''
        Node through which everything is sent, by name or address. While it cannot be reached, nothing leaves this machine.
      '';
    };

    exitNodeAllowLanAccess = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether the networks this machine is connected to are reached directly while an exit node is used.";
    };

    snatSubnetRoutes = lib.mkOption {
      type = lib.types.bool;
      default = true;
      example = false;
      description = ''
        Whether networks that this machine routes see its own address instead of the senders'. Without it they need routes back
        to the mesh.
      '';
    };

    statefulFiltering = lib.mkOption {
      type = lib.types.bool;
      default = false;
      example = true;
      description = "Whether networks that this machine routes may only answer the mesh, and begin nothing.";
    };

    netfilterMode = lib.mkOption {
      type = lib.types.enum [
        "on"
        "nodivert"
        "off"
      ];
      default = "on";
      example = "off";
      description = ''
        How far the host's firewall is the client's business: it fills tables of its own and leads packets there (`on`), fills them
        only (`nodivert`), or does nothing (`off`).
      '';
    };

    routing = lib.mkOption {
      type = lib.types.enum [
        "none"
        "client"
        "server"
        "both"
      ];
      default =
        if advertises && uses then
          "both"
        else if advertises then
          "server"
        else if uses then
          "client"
        else
          "none";
      defaultText = lib.literalMD "what the other options need";
      example = "server";
      description = ''
        What the kernel is prepared for: to forward packets (`server`, for subnet routers and exit nodes), to use routes of others in
        spite of strict reverse-path filters (`client`), or `both`. With forwarding, Linux learns no IPv6 routes from router
        advertisements any more, unless `net.ipv6.conf.<uplink>.accept_ra` is 2.
      '';
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = (cfg.loginServer == null) == (cfg.authKeyFile == null);
        message = "services.lacis.client: loginServer and authKeyFile go together; set both, or neither and sign in with `lacis up`.";
      }
      {
        assertion = !inStore cfg.authKeyFile;
        message = "services.lacis.client.authKeyFile is in the world-readable Nix store: give a path outside it.";
      }
      {
        assertion = (advertises || uses) -> cfg.loginServer != null;
        message = "services.lacis.client: routes and exit nodes are set when the machine signs in; set loginServer and authKeyFile too, or use `lacis set` and the option routing.";
      }
      {
        assertion = !(cfg.advertiseExitNode && cfg.exitNode != null);
        message = "services.lacis.client: a node cannot use an exit node (exitNode) and be one (advertiseExitNode).";
      }
      {
        assertion = cfg.exitNodeAllowLanAccess -> cfg.exitNode != null;
        message = "services.lacis.client.exitNodeAllowLanAccess is of use only with exitNode.";
      }
      {
        assertion = !lib.any (lib.hasSuffix "/0") cfg.advertiseRoutes;
        message = "services.lacis.client.advertiseRoutes has a default route: set advertiseExitNode instead.";
      }
      {
        assertion = (cfg.tags != null || cfg.shieldsUp != null || cfg.operator != null) -> cfg.loginServer != null;
        message = "services.lacis.client: tags, shieldsUp and operator are set when the machine signs in; set loginServer and authKeyFile too, or use `lacis set`.";
      }
      {
        assertion = !config.services.tailscale.enable;
        message = "services.lacis.client and services.tailscale use the same routing table (52), rules, marks and resolver address: enable one of them.";
      }
      {
        assertion = cfg.netfilterMode == "off" && uses -> !isStrict;
        message = "services.lacis.client.netfilterMode = \"off\" with routes of others: the strict reverse-path filter of networking.firewall drops every answer. Leave it \"on\", or set networking.firewall.checkReversePath = \"loose\".";
      }
    ];
    warnings =
      lib.optional (cfg.openFirewall && cfg.port == 0)
        "services.lacis.client.openFirewall opens nothing, because the port is not known beforehand (port = 0)."
      ++ lib.optional (cfg.netfilterMode == "nodivert" && uses && isStrict)
        "services.lacis.client.netfilterMode = \"nodivert\" with routes of others: unless your own rules lead packets to the client's chains, the strict reverse-path filter of networking.firewall drops every answer.";

    environment.systemPackages = [ cfg.package ];
    boot.kernelModules = [ "tun" ];
    boot.kernel.sysctl = lib.mkMerge [
      (lib.mkIf routes {
        # Before the defaults of NixOS, behind what the administrator says.
        "net.ipv4.conf.all.forwarding" = lib.mkOverride 97 true;
        "net.ipv6.conf.all.forwarding" = lib.mkOverride 97 true;
      })
      (lib.mkIf isRouted { "net.ipv4.conf.all.src_valid_mark" = lib.mkDefault 1; })
    ];

    # The unit comes with the package; only what depends on the options is added here.
    systemd.packages = [ cfg.package ];
    systemd.services.lacisd = {
      wantedBy = [ "multi-user.target" ];
      # One restart at the end of a switch, so that a deployment through the tunnel goes on.
      stopIfChanged = false;
      # networking.proxy: the way to the coordinator and the relays, where only a proxy leads out.
      environment = lib.filterAttrs (
        name: _:
        lib.elem name [
          "http_proxy"
          "https_proxy"
          "all_proxy"
          "no_proxy"
        ]
      ) config.networking.proxy.envVars;
      path = [
        pkgs.nftables
      ]
      ++ lib.optional config.networking.resolvconf.enable config.networking.resolvconf.package;
      serviceConfig.ExecStart = [
        ""
        (utils.escapeSystemdExecArgs (
          [
            (lib.getExe' cfg.package "lacisd")
            "--state-dir"
            "/var/lib/lacis"
            "--socket"
            "/run/lacis/lacisd.sock"
            "--tun"
            cfg.interface
            "--port"
            (toString cfg.port)
            "--port-mapping"
            (lib.boolToString cfg.portMapping)
            "--port-search"
            (lib.boolToString cfg.portSearch)
          ]
          ++ lib.concatMap (endpoint: [
            "--endpoint"
            endpoint
          ]) cfg.endpoints
        ))
      ];
    };

    # Signs in where the machine is not in the network, and otherwise only sets what is declared. While the coordinator is
    # away it tries again and holds nothing up (Type=exec).
    systemd.services.lacis-up = lib.mkIf (cfg.loginServer != null) {
      description = "Sign in to the mesh";
      wantedBy = [ "multi-user.target" ];
      after = [ "lacisd.service" ];
      requires = [ "lacisd.service" ];
      unitConfig.StartLimitIntervalSec = 0;
      serviceConfig = {
        Type = "exec";
        RemainAfterExit = true;
        Restart = "on-failure";
        RestartSec = "5s";
        RestartSteps = 8;
        RestartMaxDelaySec = "5min";
        LoadCredential = [ "auth-key:${cfg.authKeyFile}" ];
        # What stands in for a key that is not there any more: nothing (systemd wants at least a character).
        SetCredential = [ "auth-key:\\n" ];
        ExecStart =
          utils.escapeSystemdExecArgs (
            [
              (lib.getExe' cfg.package "lacis")
              "up"
              "--if-needed"
              (flag "login-server" cfg.loginServer)
              (flag "hostname" (if cfg.hostname == null then "" else cfg.hostname))
              (flag "accept-dns" cfg.acceptDns)
              (flag "accept-routes" cfg.acceptRoutes)
              (flag "advertise-routes" (lib.concatStringsSep "," cfg.advertiseRoutes))
              (flag "advertise-exit-node" cfg.advertiseExitNode)
              (flag "exit-node" (if cfg.exitNode == null then "" else cfg.exitNode))
              (flag "exit-node-allow-lan-access" cfg.exitNodeAllowLanAccess)
              (flag "snat-subnet-routes" cfg.snatSubnetRoutes)
              (flag "stateful-filtering" cfg.statefulFiltering)
              (flag "netfilter-mode" cfg.netfilterMode)
              "--timeout=30s"
            ]
            ++ lib.optional (cfg.tags != null) (flag "advertise-tags" (lib.concatStringsSep "," cfg.tags))
            ++ lib.optional (cfg.shieldsUp != null) (flag "shields-up" cfg.shieldsUp)
            ++ lib.optional (cfg.operator != null) (flag "operator" cfg.operator)
          )
          + " --auth-key=file:%d/auth-key";

        # All it does is to talk to the daemon's socket.
        CapabilityBoundingSet = "";
        NoNewPrivileges = true;
        PrivateNetwork = true;
        RestrictAddressFamilies = [ "AF_UNIX" ];
        PrivateDevices = true;
        PrivateTmp = true;
        PrivateIPC = true;
        ProtectSystem = "strict";
        ProtectHome = true;
        ProtectProc = "invisible";
        ProcSubset = "pid";
        ProtectKernelTunables = true;
        ProtectKernelModules = true;
        ProtectKernelLogs = true;
        ProtectControlGroups = true;
        ProtectClock = true;
        ProtectHostname = true;
        RestrictNamespaces = true;
        RestrictRealtime = true;
        RestrictSUIDSGID = true;
        LockPersonality = true;
        MemoryDenyWriteExecute = true;
        SystemCallArchitectures = "native";
        SystemCallFilter = [
          "@system-service"
          "~@privileged @resources"
        ];
        UMask = "0077";
      };
    };

    networking.firewall = {
      allowedUDPPorts = lib.mkIf (cfg.openFirewall && cfg.port != 0) [ cfg.port ];
      trustedInterfaces = lib.mkIf cfg.trustInterface [ cfg.interface ];
      # What one table accepts another may still drop: the mesh's own rules decide who forwards what.
      extraForwardRules = lib.mkIf (routes && config.networking.firewall.filterForward) ''
        iifname "${cfg.interface}" accept
        oifname "${cfg.interface}" accept
      '';
    };

    # Nobody else configures the interface.
    networking.dhcpcd.denyInterfaces = [ cfg.interface ];
    networking.networkmanager.unmanaged = [ "interface-name:${cfg.interface}" ];
    systemd.network.networks."50-lacis" = lib.mkIf config.networking.useNetworkd {
      matchConfig.Name = cfg.interface;
      linkConfig = {
        Unmanaged = true;
        ActivationPolicy = "manual";
      };
    };
    systemd.network.wait-online.ignoredInterfaces = [ cfg.interface ];
  };
}
